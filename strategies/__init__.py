"""What a step computes and how it is cut up: schedules, sharding, planners. No Ray in here."""
