"""Speed, measured: ratios of variants that took turns in one run, never absolute times alone."""
