"""Running methods: the trainer and what it needs, and supervised training of teachers."""
