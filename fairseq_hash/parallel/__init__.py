"""Who holds which experts, and what ranks say to each other. torch only."""
