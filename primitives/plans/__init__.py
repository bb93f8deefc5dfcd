"""How each layout is cut into work: chunks for the CPU, work items for a device."""
