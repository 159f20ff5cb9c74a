"""The study as a whole: profiles, fingerprints, pipeline, sweep, command line."""
