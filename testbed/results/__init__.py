"""The results file: its schema, its writer and its reader. Importable without torch and MPI."""
