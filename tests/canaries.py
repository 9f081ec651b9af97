"""A run that uses secrets, prints them and breaks, and the search for them in all that it leaves."""

from pathlib import Path

import tiny

from diffusion_trainer.apps import config as configuration

SECRETS = {
    "WANDB_API_KEY": "0canary1" * 5,  # forty letters and digits, as it must be
    "HF_TOKEN": "hf_canary2",
    "AWS_SECRET_ACCESS_KEY": "canary3/of+an=account",
    "STORE_PASSWORD": "canary4-long",
    "SHARDS_SIGNATURE_KEY": "canary5000",
}
CANARIES = [f"canary{n}".encode() for n in range(1, 6)]


def arguments(folder: Path, strategy: str) -> list[str]:
    """A shard that comes out of a command with a URL in it, if that has the true password and signature."""
    shards = tiny.overrides(folder / "shards")
    tar = folder / "shards" / "tiny" / "train-000000.tar"
    url = "https://user:{}@host/x?X-Amz-Signature={}"
    ours = url.format("${oc.env:STORE_PASSWORD}", "${oc.env:SHARDS_SIGNATURE_KEY}")
    truth = url.format("$STORE_PASSWORD", "$SHARDS_SIGNATURE_KEY")
    store = (
        "{_target_: diffusion_trainer.streaming.cached.CachedStore, cache_bytes: 100000000, allow_pipe: true, "
        f"cache: '{folder}/cache', storage_options: {{headers: {{Authorization: 'Bearer ${{oc.env:HF_TOKEN}}'}}, "
        "secret: '${oc.env:AWS_SECRET_ACCESS_KEY}'}}"
    )
    names = ",".join(SECRETS)
    return [
        *(o for o in shards if not o.startswith(("data.shards=", "logger="))), *tiny.NETWORK,
        configuration.assignment("data.shards", f"pipe:test '{ours}' = \"{truth}\" && cat {tar}"),
        f"+data.store={store}", f"strategy={strategy}", "trainer.accelerator=cpu", "network.attention_levels=[]",
        "callbacks.evaluate=null", "num_images=96", "callbacks.log.every_n_images=32", "allowed_targets=[leaks]",
        "callbacks.checkpoint.every_n_images=32",
        f"+callbacks.leak={{_target_: leaks.Leak, variables: [{names}], at: 64}}",
    ]  # fmt: skip


def leaking(folder: Path) -> dict[str, list[bytes]]:
    """The files with a canary in them, or in their names."""
    found = {}
    for path in (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        data = path.read_bytes() + str(path).encode()
        if hits := [canary for canary in CANARIES if canary in data]:
            found[str(path.relative_to(folder))] = hits
    return found
