"""Tasks: what an input is and how an answer is judged."""
