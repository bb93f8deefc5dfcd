"""What attention/huggingface.py is made of: masks, the attention function, and two adapters."""
