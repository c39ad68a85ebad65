"""OpenRLHF imports it for packed rows and several processes, of which there are none."""
