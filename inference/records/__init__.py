"""What a run reports beside label maps: manifest, statistics, flags, previews."""
