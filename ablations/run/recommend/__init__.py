"""``sievit recommend``: one call of the search, from images and a cost to a placement that was confirmed."""
