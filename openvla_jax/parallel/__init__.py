"""Devices: the mesh, sharding rules, activation constraints, and facts about TPUs."""
