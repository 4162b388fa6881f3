"""Wall times of compiled functions, and the machine they were measured on."""
