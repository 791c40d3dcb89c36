"""Tables, maps and pictures of importance matrices."""
