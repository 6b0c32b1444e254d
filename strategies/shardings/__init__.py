"""Who keeps which parameters, sums and states, and sends what when: one file each, listed in ``registry``."""
