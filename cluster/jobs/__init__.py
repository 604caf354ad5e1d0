"""What workers do: one file per stage, each a frozen task, a function on it, and what comes back."""
