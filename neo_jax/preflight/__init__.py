"""Will a config fit on a machine, and how fast: answered by compiling its train step for devices we lack."""
