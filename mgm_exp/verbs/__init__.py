"""One file for each verb of ``mgm-exp`` whose arguments do not fit into a few lines: ``run(arguments) -> exit code``."""
