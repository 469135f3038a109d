"""One loop that trains every task, and what it needs."""
