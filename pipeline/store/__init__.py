"""The folder that stage one writes: its format, and how it is written, read and joined."""
