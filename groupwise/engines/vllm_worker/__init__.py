"""What Groupwise adds to vLLM, in a folder that goes on its path alone."""
