"""axolotl imports it for a service that is not asked to log; nothing of it is used."""
