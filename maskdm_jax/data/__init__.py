"""Images: preparing them, finding them, and feeding them to the devices."""
