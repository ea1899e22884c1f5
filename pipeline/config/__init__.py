"""The settings: the schema, and how a YAML file becomes one."""
