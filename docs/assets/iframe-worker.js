// Stands for the shim that the search would fetch: pages load nothing from elsewhere.
