"""Devices and topologies: what a rank computes on, and how many ranks there are."""
