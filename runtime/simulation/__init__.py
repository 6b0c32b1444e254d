"""The real controller and planner under a simulated clock and network, with toy state."""
