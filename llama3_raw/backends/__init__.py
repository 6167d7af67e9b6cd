"""The fast `Ops` of each device, and `Ops` for weights that do not fit on one device."""
