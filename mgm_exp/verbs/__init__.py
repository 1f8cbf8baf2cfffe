"""One file for each verb of ``mgm-exp`` whose arguments need a page: ``run(arguments)`` gives the exit code."""
