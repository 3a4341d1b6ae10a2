"""The data sets: from their source to the arrays that training sees."""
