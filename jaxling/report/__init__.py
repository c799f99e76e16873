"""What a run shows and leaves behind: tables, pictures, pages."""
