"""What each attention head does: scores and how they are measured."""
