"""What a distillation is: the task, the hooks, the loop, what a backend must give."""
