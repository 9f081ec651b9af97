"""Networks: torch only, one device, no schedule, no guidance, no precision policy."""
