"""The paper: views → CAMs → mask → student → teacher → losses; `step` tells it in order."""
