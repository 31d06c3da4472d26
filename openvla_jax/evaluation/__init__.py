"""Closed-loop evaluation: rollouts in the embedded world, success rates with intervals, figures."""
