"""Where the parts of a run live: this process, or many machines. The loop is the same."""
