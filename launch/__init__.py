"""How a run is started: the quickstart script and the experiments that come with the testbed."""
