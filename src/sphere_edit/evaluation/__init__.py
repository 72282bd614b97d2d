"""What the edited model knows, what it kept, and how it still reads ordinary text."""
