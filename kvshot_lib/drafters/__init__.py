"""The drafters: what tells them apart, how they read the target, how they are kept."""
