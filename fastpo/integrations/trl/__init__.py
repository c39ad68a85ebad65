"""TRL's trainers on fastpo's head; `fastpo.patch` and its companions."""
