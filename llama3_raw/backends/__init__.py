"""The fast `Ops` of each device, and those for weights that do not all fit on one."""
