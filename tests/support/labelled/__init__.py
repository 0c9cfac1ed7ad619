"""A made-up family: LLaVA-OneVision whose frames are labelled by text, with extra channels of the tower."""
