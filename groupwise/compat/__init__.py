"""Front doors: other trainers' names, which become the one config and call the one loop. None knows another."""
