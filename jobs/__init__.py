"""What a person starts: the command line, the jobs, and the models, data and recipes they use."""
