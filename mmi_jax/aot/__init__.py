"""Ahead-of-time compilation for topologies that are not attached, and roofline lower bounds."""
