"""`refshard submit`: job files for Slurm and Kubernetes."""
