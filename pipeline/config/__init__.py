"""The settings of a run: the schema, and how a YAML file becomes one."""
