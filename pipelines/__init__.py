"""Jobs on Ray Data and Ray Train over core: worlds, training, conversion, evaluation."""
