"""The folder that stage one writes."""
