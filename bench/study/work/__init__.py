"""How a study is done: what is to be done, by several processes, with everything kept."""
