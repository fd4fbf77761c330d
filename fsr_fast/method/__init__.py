"""The paper: views → CAMs → mask → student → teacher → losses; `step` runs them in order."""
