"""The whole journeys: arms, schemes, methods, results."""
